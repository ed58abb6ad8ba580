package content_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"distkit/content"

	"github.com/opencontainers/go-digest"
)

func init() {
	jobs["unused"] = func(s *content.Store, args []string) error {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		u := s.Unused(time.Now().Add(time.Hour), time.Now())
		defer u.Close()
		for i := range n {
			if err := u.Delete(unusedBlob(i)); err != nil {
				return err
			}
		}
		return nil
	}
	jobs["zeros"] = func(s *content.Store, args []string) error {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		_, err = content.WriteBlob(context.Background(), s, "zeros", bytes.NewReader(make([]byte, n)), int64(n), "")
		return err
	}
	jobs["walk"] = func(s *content.Store, _ []string) error {
		return s.WalkSizes(context.Background(), func(content.Info) error { return nil })
	}
}

// unusedBlob is the digest of a blob that uses the same lock as all others.
func unusedBlob(i int) digest.Digest { return digest.Digest(fmt.Sprintf("sha256:%064x", i)) }

// systemCalls runs a job in a process of its own. It counts the job's system calls on files, either those of a name or
// all of them ("total").
func systemCalls(t *testing.T, name, job string, args ...string) int {
	t.Helper()
	strace, err := exec.LookPath("strace")
	require(t, "strace", err)
	counts := filepath.Join(t.TempDir(), "counts")
	c := childCommand(job, args...)
	c.Args = append([]string{strace, "-f", "-c", "-e", "trace=%file,%desc", "-e", "signal=none", "-o", counts}, c.Args...)
	c.Path = strace
	if out, err := c.Output(); err != nil {
		t.Fatalf("%s: %v\n%s", job, err, out)
	}
	b, err := os.ReadFile(counts)
	if err != nil {
		t.Fatal(err)
	}
	count := regexp.MustCompile(`(?m)^ *[\d.]+ +\S+ +\S* +(\d+) .*\b` + name + `$`).FindSubmatch(b)
	if count == nil {
		t.Fatalf("no %s: %s", name, b)
	}
	n, _ := strconv.Atoi(string(count[1]))
	return n
}

// The disk writes while a large blob still arrives, so the sync of the commit does not wait for all of it.
func TestWritebackBeginsWhileABlobArrives(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	if n := systemCalls(t, "sync_file_range", "zeros", s.Root(), strconv.Itoa(25<<20)); n != 3 {
		t.Errorf("write-back was begun %d times for 25 MiB, want 3", n)
	}
}

// A sweep takes the lock that blobs share once, and reads a blob's attributes relative to the directory that it lists.
func TestSystemCallsOfASweep(t *testing.T) {
	t.Parallel()
	const few, many = 10, 510
	for job, most := range map[string]float64{"walk": 2, "unused": 20} {
		calls := map[int]int{}
		for _, n := range []int{few, many} {
			s := newStore(t)
			put(t, s, []byte("x"))
			for i := range n {
				if err := os.WriteFile(filepath.Join(s.Root(), "blobs/sha256", unusedBlob(i).Encoded()), nil, 0o444); err != nil {
					t.Fatal(err)
				}
			}
			calls[n] = systemCalls(t, "total", job, s.Root(), strconv.Itoa(n))
		}
		if each := float64(calls[many]-calls[few]) / (many - few); each < 1 || each > most {
			t.Errorf("%s: %.1f system calls a blob, want at most %.0f", job, each, most)
		} else {
			t.Logf("%s: %.1f", job, each)
		}
	}
}
