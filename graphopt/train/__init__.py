"""Training of programs: ``fine_tune``, ``distill`` and ``evaluate``. A program is also a plain module for a loop of one's own."""

from graphopt.train.evaluation import Evaluation as Evaluation
from graphopt.train.evaluation import evaluate as evaluate
from graphopt.train.options import Options as Options
from graphopt.train.recover import distill as distill
from graphopt.train.recover import fine_tune as fine_tune
