"""A folder for ``PYTHONPATH`` in which `vocabguard run` puts its ``sitecustomize``; nothing else may lie in it."""
