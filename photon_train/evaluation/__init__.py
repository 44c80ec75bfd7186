"""Answers and the questions they belong to -> scores, intervals, blind baselines and costs. docs/evaluation.md says which."""
