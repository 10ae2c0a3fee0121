"""The store of latents or pixels that `fastmask.prepare` writes: manifest, reader, writer and checks."""
