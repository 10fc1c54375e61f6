"""`python -m experiments.imagenet_mbv2 --config=configs/imagenet_mbv2.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_mbv2.py")
