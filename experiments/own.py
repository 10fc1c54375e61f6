"""`python -m experiments.own --config=configs/own.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/own.py")
