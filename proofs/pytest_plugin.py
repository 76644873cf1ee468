"""pytest plugin of the verification suite: registered under the entry point `birkhoff_proofs`."""
