"""`python -m experiments.digits_r20 --config=configs/digits_r20.py --workdir=...`."""

from experiments import launch

if __name__ == "__main__":
    launch.run("configs/digits_r20.py")
