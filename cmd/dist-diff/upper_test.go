package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The changes of an overlay are read from its upper directory. However much the lower layers have, no system call is
// made for files that only they have.
func TestUpperAlone(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		if slices.Contains(strings.Split(os.Getenv("TEST_REQUIRE"), ","), "strace") {
			t.Fatal(err)
		}
		t.Skip("wants strace")
	}
	work := t.TempDir()
	for dir, n := range map[string]int{"lower": 3000, "upper": 3} {
		if err := os.Mkdir(filepath.Join(work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if err := os.WriteFile(filepath.Join(work, dir, fmt.Sprint(i)), []byte(dir), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	exe := filepath.Join(work, "dist-diff")
	if out, err := exec.Command("go", "build", "-o", exe, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	calls := func(args ...string) int {
		t.Helper()
		counts := filepath.Join(work, "counts")
		c := exec.Command("strace", append([]string{"-f", "-c", "-e", "trace=%file,%desc", "-o", counts, exe, "--compress", "none"}, args...)...)
		c.Dir = work
		out, err := c.Output()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), "upper") {
			t.Error("the layer does not hold what has changed")
		}
		b, err := os.ReadFile(counts)
		if err != nil {
			t.Fatal(err)
		}
		total := regexp.MustCompile(`(?m)^100\.00 +\S+ +\S* +(\d+) .*total$`).FindSubmatch(b)
		if total == nil {
			t.Fatalf("no total: %s", b)
		}
		n, _ := strconv.Atoi(string(total[1]))
		return n
	}
	upper, both := calls("--overlay", "upper"), calls("lower", "upper")
	if upper > 400 || both < 3000 {
		t.Errorf("%d system calls for the upper directory, %d for both", upper, both)
	}
}
