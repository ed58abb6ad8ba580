package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// A look at a container that is ending and being removed shows how it has ended, or that it is gone. It never shows
// that it was not started, or that nobody saw its end.
func TestLookBesideRemoval(t *testing.T) {
	store := t.TempDir()
	for n := range 300 {
		all := &Containers{root: store, state: t.TempDir()}
		p := &Process{c: &Container{set: all}, name: fmt.Sprint(n), private: all.state}
		dir := p.dir()
		kind := "container.json"
		if n%2 == 1 {
			kind = "process.json"
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, kind), []byte("{}\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := p.look(); err != nil || l.status != Created {
			t.Fatalf("before it runs it is %q: %v", l.status, err)
		}
		dead := HostProcess{Pid: 1<<22 + 1, Boot: bootID()}
		if err := p.writeState(state{Status: Running, HostProcess: dead, Monitor: dead}); err != nil {
			t.Fatal(err)
		}
		if err := p.blankExit(); err != nil {
			t.Fatal(err)
		}
		if l, err := p.look(); err != nil || l.status != Stopped || l.exit.Error != errLost {
			t.Fatalf("with a dead monitor it is %q: %v", l.status, err)
		}
		status := 7
		if err := p.writeExit(Exit{Status: &status, Exited: time.Now()}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for {
					l, err := p.look()
					if errdefs.IsNotFound(err) {
						return
					}
					if err != nil || l.status != Stopped || l.exit.Status == nil || *l.exit.Status != status {
						t.Errorf("it is %q, its exit %+v: %v", l.status, l.exit, err)
						return
					}
				}
			})
		}
		if err := os.Remove(filepath.Join(p.private, "state.json")); err != nil {
			t.Error(err)
		}
		if err := p.removeDir(nil); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if t.Failed() {
			return
		}
	}
}
