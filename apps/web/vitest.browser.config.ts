import { defineConfig } from "vitest/config";

// One browser at a time: the machines of continuous integration have two cores, and times are measured.
export default defineConfig({
  test: {
    include: ["tests/browser/*.spec.ts"],
    fileParallelism: false,
    testTimeout: 180_000,
    hookTimeout: 180_000,
  },
});
