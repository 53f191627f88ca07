"""Networks as chains: one layer's weights are enough to run one. Made from transformers models or any nn.Module."""
