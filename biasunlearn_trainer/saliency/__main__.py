"""Build a recipe's saliency mask and show where it lies.

    python -m biasunlearn_trainer.saliency recipes/planted_entities_ga_diff.yaml --method mmunlearner

The options are those of `runner.mask.build_parser` beside the recipe's keys; `--help` lists them.
"""

import sys

from biasunlearn_trainer.runner.mask import main

if __name__ == "__main__":
    sys.exit(main())
