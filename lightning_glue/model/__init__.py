"""fairseq's RoBERTa: built, filled with pretrained weights, and run on real tokens only."""
