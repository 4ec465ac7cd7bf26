"""Which way each weight is rounded: GPTQ, AdaRound, BRECQ, output correction."""
