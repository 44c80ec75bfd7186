"""`torchrun -m photon_cli train ...`: the photon command, for launchers that start modules."""

from photon_cli.photon import main

if __name__ == "__main__":
    main()
