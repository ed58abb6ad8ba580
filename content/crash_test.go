package content_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

var crashFor = flag.Duration("crash", 3*time.Second, "how long processes are killed at random")

const (
	crashers   = 6
	crashBlobs = 12
	crashRefs  = 4
)

// crashBlob is one of the blobs that all processes use. They are the same in each.
func crashBlob(i int) ([]byte, digest.Digest) {
	b := make([]byte, 1000*(1+i*i*i))
	_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(b)
	return b, digest.FromBytes(b)
}

// pieces returns a reader's bytes in small reads, so that a kill interrupts an ingest.
type pieces struct{ *bytes.Reader }

func (p pieces) Read(b []byte) (int, error) { return p.Reader.Read(b[:min(len(b), 4096)]) }

// havoc calls random operations of the store. It fails only if the store misbehaves.
func havoc(s *content.Store, seed uint64) error {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(seed, 0))
	for {
		b, dgst := crashBlob(r.IntN(crashBlobs))
		ref := "ref" + strconv.Itoa(r.IntN(crashRefs))
		var err error
		switch r.IntN(8) {
		case 0:
			var w *content.Writer
			if w, err = s.Writer(ctx, ref, int64(len(b)), dgst); err == nil {
				_, err = w.Write(b[w.Offset():])
				err = errors.Join(err, w.Close())
			}
			if errdefs.IsAlreadyExists(err) {
				err = nil
			}
		case 1:
			_, err = content.WriteBlob(ctx, s, ref, pieces{bytes.NewReader(b)}, 0, "")
		case 2, 3, 4:
			_, err = content.WriteBlob(ctx, s, ref, pieces{bytes.NewReader(b)}, int64(len(b)), dgst)
		case 5:
			key := "k" + strconv.Itoa(r.IntN(5))
			_, err = s.Update(ctx, content.Info{Digest: dgst, Labels: map[string]string{key: strconv.FormatUint(seed, 10)}}, "labels."+key)
		case 6:
			err = s.Delete(ctx, dgst)
		case 7:
			if r.IntN(4) == 0 {
				err = s.Abort(ctx, ref)
			}
			if err == nil || errdefs.IsNotFound(err) {
				_, err = s.ListStatuses(ctx)
			}
			if err == nil {
				err = s.Walk(ctx, func(content.Info) error { return nil })
			}
		}
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
			return err
		}
	}
}

// TestKilledProcesses kills processes that share a store, at random instants, and checks after each round that the
// store is as distkit-layout(5) promises.
func TestKilledProcesses(t *testing.T) {
	s := newStore(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	type process struct {
		c    *exec.Cmd
		errs *bytes.Buffer
	}
	start := func() process {
		p := process{childCommand("havoc", s.Root(), strconv.FormatUint(r.Uint64()>>1, 10)), &bytes.Buffer{}}
		p.c.Stderr = p.errs
		if err := p.c.Start(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	end := func(p process) {
		_ = p.c.Process.Kill()
		_ = p.c.Wait()
		if p.errs.Len() > 0 {
			t.Errorf("a process failed: %s", p.errs)
		}
	}
	kills := 0
	for begin := time.Now(); time.Since(begin) < *crashFor && !t.Failed(); {
		var running []process
		for range crashers {
			running = append(running, start())
		}
		for range 3 * crashers {
			time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
			i := r.IntN(len(running))
			end(running[i])
			kills++
			running[i] = start()
		}
		for _, p := range running {
			end(p)
			kills++
		}
		checkStore(t, s)
	}
	t.Logf("%d processes were killed", kills)
	// In spite of the files that the killed processes left, every blob can be stored now.
	for i := range crashBlobs {
		b, dgst := crashBlob(i)
		for _, expected := range []digest.Digest{dgst, ""} {
			if _, err := content.WriteBlob(t.Context(), s, "ref"+strconv.Itoa(i%crashRefs), bytes.NewReader(b), int64(len(b)), expected); err != nil {
				t.Error(err)
			}
		}
		wantBlob(t, s, dgst, b)
	}
	checkStore(t, s)
}

// checkStore checks the invariants of a store that nobody uses.
func checkStore(t *testing.T, s *content.Store) {
	t.Helper()
	for _, name := range []string{"oci-layout", "index.json"} {
		if b, err := os.ReadFile(filepath.Join(s.Root(), name)); err != nil || !json.Valid(b) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	blobs := filepath.Join(s.Root(), "blobs", "sha256")
	entries, err := os.ReadDir(blobs)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(blobs, e.Name()))
		if err != nil || digest.FromBytes(b).Encoded() != e.Name() {
			t.Errorf("blob %s: %d bytes, %v", e.Name(), len(b), err)
		}
		if fi, err := e.Info(); err != nil || fi.Mode() != 0o444 {
			t.Errorf("blob %s: mode %v, %v", e.Name(), fi.Mode(), err)
		}
	}
	labels, _ := filepath.Glob(filepath.Join(s.Root(), "labels", "sha256", "*"))
	for _, path := range labels {
		var set map[string]string
		if b, err := os.ReadFile(path); err != nil || json.Unmarshal(b, &set) != nil {
			t.Errorf("labels %s: %q, %v", path, b, err)
		}
		if _, err := os.Stat(filepath.Join(blobs, filepath.Base(path))); err != nil {
			t.Errorf("labels without a blob: %v", err)
		}
	}
	list, err := s.ListStatuses(t.Context())
	if err != nil {
		t.Error(err)
	}
	for _, st := range list {
		if st.Active {
			t.Errorf("nobody is there, but %+v", st)
		}
	}
	top, _ := os.ReadDir(s.Root())
	for _, e := range top {
		if !strings.Contains(" blobs events index.json ingest labels locks oci-layout ", " "+e.Name()+" ") {
			t.Errorf("left: %s", e.Name())
		}
	}
}

func init() {
	jobs["havoc"] = func(s *content.Store, args []string) error {
		seed, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return err
		}
		return fmt.Errorf("havoc %d: %w", seed, havoc(s, seed))
	}
}
