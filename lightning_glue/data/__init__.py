"""From raw GLUE files to batches: download, reading, byte-pair encoding, fairseq's binary format, samplers."""
