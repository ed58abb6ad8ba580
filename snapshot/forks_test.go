package snapshot_test

import (
	"os/exec"
	"sync"
	"testing"

	"distkit/snapshot/native"
)

// A child process that another goroutine starts holds our open and locked files until it executes its program. That
// must not keep a snapshot from being removed at once.
func TestRemoveBesideForks(t *testing.T) {
	s := open(t, t.TempDir(), native.Driver{})
	stop := make(chan struct{})
	var forks sync.WaitGroup
	for range 4 {
		forks.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = exec.Command("true").Run()
				}
			}
		})
	}
	defer forks.Wait()
	defer close(stop)
	for range 300 {
		if _, err := s.Prepare(t.Context(), "key", "", nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(t.Context(), "key"); err != nil {
			t.Fatal(err)
		}
	}
}
