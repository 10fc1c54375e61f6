"""`python -m experiments.imagenet_r50 --config=configs/imagenet_r50.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_r50.py")
