"""`python -m experiments.imagenet_mbv3s --config=configs/imagenet_mbv3s.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_mbv3s.py")
