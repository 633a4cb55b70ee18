"""Runs a recipe.

accelerate launch recipes/run.py recipes/demo.yaml
accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/run.py recipes/llava_npo.yaml --learning_rate 1e-5
python recipes/run.py recipes/demo.yaml --dry_run      # check everything, train nothing
python recipes/run.py --method npo --help              # every key, its default and its meaning
"""

import sys

from biasunlearn_trainer.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
