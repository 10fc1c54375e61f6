"""`python -m experiments.cifar10_mbv2 --config=configs/cifar10_mbv2.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/cifar10_mbv2.py")
