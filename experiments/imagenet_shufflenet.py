"""`python -m experiments.imagenet_shufflenet --config=configs/imagenet_shufflenet.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/imagenet_shufflenet.py")
