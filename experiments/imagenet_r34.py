"""`python -m experiments.imagenet_r34 --config=configs/imagenet_r34.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_r34.py")
