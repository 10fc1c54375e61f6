"""`python -m experiments.cifar10_r56 --config=configs/cifar10_r56.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/cifar10_r56.py")
