"""Values inside an ExecuTorch program, compared tensor by tensor."""
