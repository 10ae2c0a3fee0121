"""What fastmask is compared with: the same networks as a careful practitioner writes them from the papers."""
