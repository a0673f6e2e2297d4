"""Files that trainers load by their path. They put the folder on ``sys.path``, so nothing else may lie in it."""
