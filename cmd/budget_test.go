package cmd_test

import (
	"os"
	"path/filepath"
	"testing"
)

// Size limits of stripped binaries: 5 MB for a primitive without network, 9 MB with TLS and HTTP. task has its own
// limit, since it stores, runs, mounts, compares and ingests whole containers.
const (
	localBudget   = 5 << 20
	taskBudget    = 15 << 19
	imageBudget   = 11 << 19 // dist-image also reads layers, and run keeps a container; both have all drivers of snapshots
	networkBudget = 9 << 20
	insideBudget  = 19 << 19 // dist-ls and dist-file read layers, with an index or without, here or at a registry
)

func TestBinarySizes(t *testing.T) {
	for _, c := range commands {
		budget := int64(localBudget)
		if usesNetwork(c) {
			budget = networkBudget
		}
		if c == "dist-image" || c == "run" {
			budget = imageBudget
		}
		if c == "dist-ls" || c == "dist-file" {
			budget = insideBudget
		}
		if c == "task" {
			budget = taskBudget
		}
		info, err := os.Stat(filepath.Join(bin, c))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-14s %8d of %8d bytes", c, info.Size(), budget)
		if info.Size() > budget {
			t.Errorf("%s has %d bytes, more than its %d", c, info.Size(), budget)
		}
	}
}
