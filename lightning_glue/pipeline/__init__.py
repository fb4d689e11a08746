"""The whole benchmark: what its models say, their ensembles and soups, its report, its submission."""
