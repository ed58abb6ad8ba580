package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
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
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

var crashFor = flag.Duration("crash", 4*time.Second, "how long processes are killed at random")

// crashEnv is set to "ROLE ROOT SEED" in the environment of a process of the test binary that is to be killed.
const crashEnv = "IMAGE_TEST_CRASH"

// roles are the functions that processes run on one store at the same time. Each ends soon.
var roles = map[string]func(context.Context, *rand.Rand, *content.Store) error{
	"name": nameImages, "unname": changeNames, "sweep": sweepAll, "partition": changeNamespaces, "loose": bringLoose,
}

var crashNamespaces = []string{"default", "one", "two"}

// The names with this prefix are created once and never removed.
const kept = "kept/"

// crashImage stores an image, the same in each process. The images share layers, and repeat one.
func crashImage(ctx context.Context, s *content.Store, i int) (v1.Descriptor, error) {
	var failed error
	add := func(mediaType string, b []byte) v1.Descriptor {
		d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		w, err := s.Writer(ctx, string(d.Digest), d.Size, d.Digest, content.Wait)
		if err == nil {
			_, err = w.Write(b[w.Offset():])
			if err == nil {
				err = w.Commit(ctx, d.Size, d.Digest, nil)
			}
			if cerr := w.Close(); err == nil {
				err = cerr
			}
		}
		if err != nil && !errdefs.IsAlreadyExists(err) && failed == nil {
			failed = err
		}
		return d
	}
	marshal := func(v any) []byte { b, _ := json.Marshal(v); return b }
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest}
	config := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, RootFS: v1.RootFS{Type: "layers"}}
	for _, n := range []int{0, i, i + 1, i} {
		layer := bytes.Repeat([]byte{byte(n)}, 1+n*5000)
		m.Layers = append(m.Layers, add(v1.MediaTypeImageLayer, layer))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(layer))
	}
	m.Config = add(v1.MediaTypeImageConfig, marshal(config))
	manifest := add(v1.MediaTypeImageManifest, marshal(m))
	index := add(v1.MediaTypeImageIndex, marshal(v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{manifest}}))
	return index, failed
}

func crashNames(r *rand.Rand, s *content.Store) (*Names, error) {
	return OpenNames(s, crashNamespaces[r.IntN(len(crashNamespaces))])
}

// nameImages does what a pull does, and prints each name that must not be lost.
func nameImages(ctx context.Context, r *rand.Rand, s *content.Store) error {
	if _, err := s.Hold(ctx); err != nil {
		return err
	}
	for range 2 + r.IntN(8) {
		d, err := crashImage(ctx, s, r.IntN(6))
		if err != nil {
			return err
		}
		names, err := crashNames(r, s)
		if err != nil {
			return err
		}
		if _, err := names.Replace(context.Background(), "shared:"+strconv.Itoa(r.IntN(8)), d); err != nil {
			return err
		}
		name := kept + strconv.FormatUint(r.Uint64(), 36)
		if _, err := names.Create(context.Background(), name, d); err != nil {
			return err
		}
		fmt.Println(names.namespace, name, d.Digest)
	}
	return nil
}

func changeNames(_ context.Context, r *rand.Rand, s *content.Store) error {
	for range 40 {
		names, err := crashNames(r, s)
		if err != nil {
			return err
		}
		all, err := names.List()
		if err != nil {
			return err
		}
		for _, img := range all {
			if strings.HasPrefix(img.Name, kept) {
				continue
			}
			switch r.IntN(4) {
			case 0:
				err = names.Delete(context.Background(), img.Name)
			case 1:
				img.Labels = map[string]string{"seen": strconv.FormatUint(r.Uint64(), 36)}
				_, err = names.Update(context.Background(), img, "labels.seen")
			}
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

func sweepAll(ctx context.Context, _ *rand.Rand, s *content.Store) error {
	later := time.Now().Add(time.Hour)
	_, err := Sweep{Store: s, Wait: time.Minute, Before: later, Leftovers: func(content.Leftover) error { return nil }}.Run(ctx, func(content.Info) error { return nil })
	return err
}

func changeNamespaces(_ context.Context, r *rand.Rand, s *content.Store) error {
	ns := OpenNamespaces(s)
	for range 40 {
		name := append(crashNamespaces, "empty")[1+r.IntN(3)]
		var err error
		switch r.IntN(3) {
		case 0:
			err = ns.Create(context.Background(), name, map[string]string{"a": "b"})
		case 1:
			err = ns.Delete(context.Background(), name)
		case 2:
			_, err = ns.SetLabels(context.Background(), name, map[string]string{"c": strconv.Itoa(r.IntN(9))})
		}
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return nil
}

// bringLoose stores blobs without a name and without a hold. The sweep may delete them at any time.
func bringLoose(ctx context.Context, r *rand.Rand, s *content.Store) error {
	for range 20 {
		b := bytes.Repeat([]byte("loose"), 1+r.IntN(20000))
		dgst, err := content.WriteBlob(ctx, s, "loose"+strconv.Itoa(r.IntN(2)), bytes.NewReader(b), 0, "")
		if err == nil {
			_, err = s.Update(ctx, content.Info{Digest: dgst, Labels: map[string]string{"k": "v"}}, "labels.k")
		}
		if err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func crashProcess(args string) {
	var role, root string
	var seed uint64
	if _, err := fmt.Sscanf(args, "%s %s %d", &role, &root, &seed); err != nil {
		panic(err)
	}
	s, err := content.Open(root)
	if err == nil {
		err = roles[role](context.Background(), rand.New(rand.NewPCG(seed, 0)), s)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s %d: %v\n", role, seed, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestKilledProcesses starts processes that store images, name them, change and delete names and namespaces, and sweep
// without a grace period. All use one store and are killed at random instants. After each round every image with a name
// is complete, and no name that was printed is lost.
func TestKilledProcesses(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var all []string
	for role := range roles {
		all = append(all, role)
	}
	all = append(all, "name", "name", "sweep")
	type process struct {
		c         *exec.Cmd
		out, errs bytes.Buffer
	}
	promised := map[string]digest.Digest{} // by namespace and name
	kills, ends := 0, 0
	start := func() *process {
		p := &process{c: exec.Command(os.Args[0])}
		p.c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", crashEnv, all[r.IntN(len(all))], root, r.Uint64()>>1))
		p.c.Stdout, p.c.Stderr = &p.out, &p.errs
		if err := p.c.Start(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	end := func(p *process, kill bool) {
		if kill {
			_ = p.c.Process.Kill()
		}
		if err := p.c.Wait(); err == nil {
			ends++
		} else {
			kills++
		}
		if p.errs.Len() > 0 {
			t.Errorf("a process failed: %s", &p.errs)
		}
		for lines := bufio.NewScanner(&p.out); lines.Scan(); {
			if w := strings.Fields(lines.Text()); len(w) == 3 {
				promised[w[0]+" "+w[1]] = digest.Digest(w[2])
			}
		}
	}
	for begin := time.Now(); time.Since(begin) < *crashFor && !t.Failed(); {
		var running []*process
		for range 6 {
			running = append(running, start())
		}
		for range 20 {
			time.Sleep(time.Duration(r.IntN(25)) * time.Millisecond)
			i := r.IntN(len(running))
			end(running[i], r.IntN(4) > 0)
			running[i] = start()
		}
		for _, p := range running {
			end(p, true)
		}
		checkNames(t, root, promised)
	}
	t.Logf("%d processes were killed, %d ended, %d names were promised", kills, ends, len(promised))
	// In spite of the files that killed processes left, a sweep runs and deletes exactly the blobs that no name leads
	// to.
	p := &process{c: exec.Command(os.Args[0])}
	p.c.Env = append(os.Environ(), fmt.Sprintf("%s=sweep %s 0", crashEnv, root))
	p.c.Stderr = &p.errs
	_ = p.c.Start()
	end(p, false)
	reached := checkNames(t, root, promised)
	blobs, err := filepath.Glob(filepath.Join(root, "blobs", "sha256", "*"))
	if err != nil || len(blobs) != len(reached) || len(promised) == 0 {
		t.Errorf("%d blobs after the sweep, %d of them with names; %d promises: %v", len(blobs), len(reached), len(promised), err)
	}
}

// checkNames checks the names against distkit-layout(5), reading only the files. It returns the digests of all blobs
// that names lead to.
func checkNames(t *testing.T, root string, promised map[string]digest.Digest) map[digest.Digest]bool {
	t.Helper()
	reached := map[digest.Digest]bool{}
	var reach func(d v1.Descriptor)
	reach = func(d v1.Descriptor) {
		if reached[d.Digest] {
			return
		}
		reached[d.Digest] = true
		b, err := os.ReadFile(filepath.Join(root, "blobs", string(d.Digest.Algorithm()), d.Digest.Encoded()))
		if err != nil || digest.FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
			t.Errorf("what has a name: %s of %d bytes: %d bytes, %v", d.Digest, d.Size, len(b), err)
			return
		}
		var doc struct {
			Manifests, Layers []v1.Descriptor
			Config            *v1.Descriptor
		}
		if d.MediaType != v1.MediaTypeImageLayer && d.MediaType != v1.MediaTypeImageConfig {
			if err := json.Unmarshal(b, &doc); err != nil {
				t.Errorf("%s: %v", d.Digest, err)
			}
		}
		if doc.Config != nil {
			reach(*doc.Config)
		}
		for _, c := range append(doc.Manifests, doc.Layers...) {
			reach(c)
		}
	}
	found := map[string]digest.Digest{}
	for _, ns := range crashNamespaces {
		path := filepath.Join(root, "namespaces", ns, "index.json")
		if ns == "default" {
			path = filepath.Join(root, "index.json")
		}
		b, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			continue
		}
		var ix v1.Index
		if err != nil || json.Unmarshal(b, &ix) != nil {
			t.Errorf("%s: %q, %v", path, b, err)
		}
		for _, d := range ix.Manifests {
			key := ns + " " + d.Annotations[v1.AnnotationRefName]
			if _, twice := found[key]; twice {
				t.Errorf("%s stands twice", key)
			}
			found[key] = d.Digest
			reach(d)
		}
	}
	for key, dgst := range promised {
		if found[key] != dgst {
			t.Errorf("lost: %s %s, now %q", key, dgst, found[key])
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "events")); err == nil {
		// Only the last line may be incomplete, until the next writer ends it.
		lines := bytes.Split(b, []byte{'\n'})
		for _, line := range lines[:len(lines)-1] {
			if !json.Valid(line) && bytes.HasPrefix(line, []byte("{")) && bytes.Count(line, []byte(`"time"`)) > 1 {
				t.Errorf("events: lines are mixed: %q", line)
			}
		}
	}
	return reached
}
