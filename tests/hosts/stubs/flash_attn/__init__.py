"""Names that OpenRLHF imports from flash-attn, which is built for a GPU; none of them is called."""
