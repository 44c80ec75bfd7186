"""Questions and answers -> scores, intervals, blind baselines and costs. docs/evaluation.md says which."""
