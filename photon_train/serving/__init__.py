"""Questions of many clients, answered by one model that encodes each volume once."""
