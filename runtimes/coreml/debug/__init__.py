"""Values inside a Core ML package: bisection, and comparison tensor by tensor."""
