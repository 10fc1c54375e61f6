"""`python -m experiments.imagenet_r101 --config=configs/imagenet_r101.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_r101.py")
