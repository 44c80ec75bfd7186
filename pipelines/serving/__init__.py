"""The HTTP side of `photon serve`: volumes that are uploaded, questions in the form of OpenAI's API."""
