"""`python -m experiments.imagenet_efficientnet_lite0 --config=configs/imagenet_efficientnet_lite0.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_efficientnet_lite0.py")
