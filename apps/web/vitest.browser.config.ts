import { defineConfig } from "vitest/config";

// One browser at a time: the machines of continuous integration have two cores, and times are measured.
export default defineConfig({
  test: {
    include: ["tests/browser/*.spec.ts"],
    fileParallelism: false,
    testTimeout: 300_000,
    hookTimeout: 600_000, // Python draws the references in them
  },
});
