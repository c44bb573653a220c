"""autoq decides, layer by layer, in which number format a language model is stored and run."""
