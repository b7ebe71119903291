"""Frame-wise Gated DeltaNet: linear attention whose state moves once a frame."""
