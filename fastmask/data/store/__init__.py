"""The store of latents or pixels that `fastmask.prepare` writes: its manifest, reader, writer and checks."""
