package remotes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"distkit/batch"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type serve = func(context.Context, Remote, io.Reader, io.Writer) error

// startBatch serves a remote over pipes. The function that it returns closes the client and returns the server's error.
func startBatch(t *testing.T, r Remote, serve serve) (*batch.Client, func() error) {
	t.Helper()
	inR, inW, err1 := os.Pipe()
	outR, outW, err2 := os.Pipe()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		err := serve(t.Context(), r, inR, outW)
		inR.Close()
		outW.Close()
		done <- err
	}()
	c := batch.NewClient(outR, inW)
	end := sync.OnceValue(func() error {
		c.Close()
		return <-done
	})
	t.Cleanup(func() { end(); outR.Close() })
	return c, end
}

func isYes(a batch.Answer) bool { return a.Word == "yes" }
func isNo(a batch.Answer) bool  { return a.Word != "yes" }

func fetchAll(ctx context.Context, c *batch.Client, object string, hints ...string) ([]byte, error) {
	o, err := c.Fetch(ctx, object, hints...)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	return io.ReadAll(o)
}

// connections counts the connections on which requests came.
func (f *fake) connections() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	from := map[string]bool{}
	for _, r := range f.requests {
		from[r.RemoteAddr] = true
	}
	return len(from)
}

func TestBatchFetchesOverOnePool(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	k := newTokens(t)
	var blobs [][]byte
	for i := range 50 {
		blobs = append(blobs, append(noise(i*3_001), byte(i)))
		k.blob(blobs[i])
	}
	c, end := startBatch(t, open(t, k.host(), Options{Streams: batch.Ahead}), FetchBatch)
	var all sync.WaitGroup
	for _, b := range blobs {
		all.Go(func() {
			d := digest.FromBytes(b).String()
			got, err := fetchAll(t.Context(), c, d, "mediatype:a/b", fmt.Sprintf("size:%d", len(b)))
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("%s: %d bytes of %d, %v", d, len(got), len(b), err)
			}
		})
	}
	all.Wait()
	m := k.manifests["latest"].content
	o, err := c.Fetch(t.Context(), "latest")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(o); err != nil || !bytes.Equal(b, m) || o.Digest != digest.FromBytes(m) || o.MediaType != ocispec.MediaTypeImageManifest || o.Size != int64(len(m)) {
		t.Errorf("latest: %q, %v, %v", b, o.Descriptor, err)
	}
	o.Close()
	if err := end(); err != nil {
		t.Error(err)
	}
	if n := k.connections(); n > batch.Ahead || len(k.asked) != 1 {
		t.Errorf("%d connections, and the token server was asked %d times", n, len(k.asked))
	}
	if n := slices.DeleteFunc(k.seen(), func(s string) bool { return s != "GET /v2/x/manifests/latest" }); len(n) != 1 {
		t.Errorf("the manifest was asked for %d times", len(n))
	}
}

func TestBatchFailuresAreAnswers(t *testing.T) {
	f := newFake(t)
	good, long := noise(100_000), noise(3<<20)
	bad := digest.FromString("what it is not").String()
	f.blobs[digest.Digest(bad)] = []byte("what it is")
	f.blob(good)
	cutDigest := f.blob(long)
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.HasSuffix(r.URL.Path, cutDigest) {
			cut(w, long, 1000)
		}
		return false
	})
	c, end := startBatch(t, open(t, f.host(), Options{Streams: batch.Ahead}), FetchBatch)
	for object, class := range map[string]func(error) bool{
		bad: errdefs.IsDataLoss, digest.FromString("none").String(): errdefs.IsNotFound, "none": errdefs.IsNotFound,
		cutDigest: errdefs.IsAborted, "sha256:12": errdefs.IsInvalidArgument,
	} {
		_, err := fetchAll(t.Context(), c, object)
		is(t, err, class)
		if b, err := fetchAll(t.Context(), c, digest.FromBytes(good).String(), "offset:10"); err != nil || !bytes.Equal(b, good[10:]) {
			t.Errorf("the object after %s: %d bytes, %v", object, len(b), err)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestBatchReferrers(t *testing.T) {
	for _, kind := range []string{"registry", "layout"} {
		subject := digest.FromString("subject")
		var list []ocispec.Descriptor
		f := newFake(t)
		f.referrers = true
		l := &Layout{dir: filepath.Join(t.TempDir(), "l")}
		for i := range 3 {
			m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":"a/%d","config":{"mediaType":"a/b"},"layers":[],"annotations":{"n":"%d"},"subject":{"digest":%q}}`, ocispec.MediaTypeImageManifest, i%2, i, subject)
			list = append(list, f.manifest("", ocispec.MediaTypeImageManifest, m))
			if _, err := l.Push(t.Context(), digest.FromBytes(m).String(), bytes.NewReader(m)); err != nil {
				t.Fatal(err)
			}
		}
		r := map[string]Remote{"registry": open(t, f.host(), Options{}), "layout": l}[kind]
		c, _ := startBatch(t, r, FetchBatch)
		for hint, want := range map[string]int{"x:y": 3, "artifacttype:a/0": 2, "artifacttype:a/9": 0} {
			lines, err := c.Referrers(t.Context(), subject, hint)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for d := json.NewDecoder(lines); d.More(); n++ {
				var desc ocispec.Descriptor
				if err := d.Decode(&desc); err != nil || !slices.ContainsFunc(list, func(d ocispec.Descriptor) bool { return d.Digest == desc.Digest }) {
					t.Errorf("%s: %v, %v", kind, desc, err)
				}
			}
			if lines.Close(); n != want {
				t.Errorf("%s: %d referrers with %s, not %d", kind, n, hint, want)
			}
		}
	}
}

func TestBatchPutsBlobsBeforeTheirManifest(t *testing.T) {
	f := newFake(t)
	r := open(t, f.host(), Options{Streams: batch.Ahead})
	c, end := startBatch(t, r, PutBatch)
	var list []ocispec.Descriptor
	var blobs [][]byte
	for i := range 20 {
		b := append(noise(i*50_000), byte(i))
		blobs = append(blobs, b)
		list = append(list, ocispec.Descriptor{MediaType: "a/b", Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	f.blob(blobs[0])
	has, err := c.HasAll(t.Context(), list)
	if err != nil || has[0].Word != "yes" || slices.ContainsFunc(has[1:], isYes) {
		t.Fatalf("%v, %v", has, err)
	}
	f.reset()
	layers, _ := json.Marshal(list)
	m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{},"layers":%s}`, ocispec.MediaTypeImageManifest, layers)
	// The registry refuses a manifest before its blobs exist.
	f.fault = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.blobs) != len(list) {
			w.WriteHeader(http.StatusBadRequest)
			return true
		}
		return false
	}
	var pipeline bytes.Buffer
	for i, b := range blobs[1:] {
		fmt.Fprintf(&pipeline, "put %s mediatype:a/b size:%d\n%d\n%s0\nend\n", list[i+1].Digest, len(b), len(b), b)
	}
	fmt.Fprintf(&pipeline, "put latest\n%d\n%s0\nend\nhas latest\nhas %s mediatype:a/b\n", len(m), m, list[3].Digest)
	var out bytes.Buffer
	if err := PutBatch(t.Context(), r, &pipeline, &out); err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, d := range list[1:] {
		want += fmt.Sprintf("stored %s %d\n", d.Digest, d.Size)
	}
	want += fmt.Sprintf("stored %s %d\nyes %[1]s %[2]d %s\nyes %s %d a/b\n", digest.FromBytes(m), len(m), ocispec.MediaTypeImageManifest, list[3].Digest, list[3].Size)
	if out.String() != want {
		t.Errorf("answers:\n%s, not:\n%s", out.String(), want)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if n := f.connections(); n > batch.Ahead {
		t.Errorf("%d connections", n)
	}
}

// After a client has found an object to be missing it can put it, and the registry is not asked for it again.
func TestBatchAsksOnce(t *testing.T) {
	f := newFake(t)
	c, _ := startBatch(t, open(t, f.host(), Options{}), PutBatch)
	b := noise(1000)
	d := digest.FromBytes(b).String()
	if _, has, err := c.Has(t.Context(), d, "mediatype:a/b"); has || err != nil {
		t.Fatal(has, err)
	}
	if _, err := c.Put(t.Context(), d, bytes.NewReader(b), "mediatype:a/b", "size:1000"); err != nil {
		t.Fatal(err)
	}
	if got := f.seen(); len(got) != 3 {
		t.Errorf("requests: %q", got)
	}
	f.reset()
	if _, has, err := c.Has(t.Context(), "latest"); has || err != nil {
		t.Fatal(has, err)
	}
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{},"layers":[]}`, ocispec.MediaTypeImageManifest)
	if _, err := c.Put(t.Context(), "latest", strings.NewReader(m)); err != nil {
		t.Fatal(err)
	}
	if got := f.seen(); len(got) != 2 {
		t.Errorf("requests for a tag: %q", got)
	}
	if got, err := c.Put(t.Context(), d, bytes.NewReader(b), "mediatype:a/b"); err != nil || got.Word != "exists" || got.Size != 1000 {
		t.Errorf("put again: %v, %v", got, err)
	}
	if got, ok, err := c.Mount(t.Context(), digest.FromString("mounted"), "other"); err != nil || !ok || got.Word != "mounted" {
		t.Errorf("mount: %v %v, %v", got, ok, err)
	}
	if _, ok, err := c.Mount(t.Context(), digest.FromString("more"), "another"); err != nil || ok {
		t.Errorf("mount of what is not there: %v, %v", ok, err)
	}
	if len(f.uploads) != 0 {
		t.Errorf("%d uploads were left open", len(f.uploads))
	}
}

func TestBatchPutCutOrWrong(t *testing.T) {
	for _, kind := range []string{"registry", "layout"} {
		f := newFake(t)
		dir := filepath.Join(t.TempDir(), "l")
		r := map[string]Remote{"registry": open(t, f.host(), Options{}), "layout": &Layout{dir: dir}}[kind]
		b := noise(1000)
		d := digest.FromBytes(b)
		stored := func() bool {
			_, err := r.Resolve(t.Context(), d.String())
			return err == nil
		}
		for what, input := range map[string]string{
			"aborted": fmt.Sprintf("put %s mediatype:a/b\n900\n%s0\nabort\n", d, b[:900]),
			"wrong":   fmt.Sprintf("put %s mediatype:a/b\n900\n%s0\nend\n", d, b[:900]),
			"cut":     fmt.Sprintf("put %s mediatype:a/b\n1000\n%s", d, b),
			"sized":   fmt.Sprintf("put %s mediatype:a/b size:900\n1000\n%s0\nend\n", d, b),
		} {
			var out bytes.Buffer
			err := PutBatch(t.Context(), r, strings.NewReader(input), &out)
			if (what == "cut") != errdefs.IsAborted(err) {
				t.Errorf("%s, %s: %v", kind, what, err)
			}
			status := map[string]string{"aborted": "error 6 ", "wrong": "error 4 ", "cut": "error 6 ", "sized": "error 4 "}[what]
			if !strings.HasPrefix(out.String(), status) || strings.Count(out.String(), "\n") != 1 || stored() {
				t.Errorf("%s, %s: answer %q; stored: %v", kind, what, out.String(), stored())
			}
		}
		var out bytes.Buffer
		for range 2 {
			input := fmt.Sprintf("put %s mediatype:a/b\n1000\n%s0\nend\n", d, b)
			if err := PutBatch(t.Context(), r, strings.NewReader(input), &out); err != nil || !stored() {
				t.Errorf("%s: %v", kind, err)
			}
		}
		// The server reads the second put while it stores the first, so whether it finds the object is not certain.
		if got := strings.Replace(out.String(), "\nexists ", "\nstored ", 1); got != fmt.Sprintf("stored %s 1000\nstored %[1]s 1000\n", d) {
			t.Errorf("%s: %q", kind, out.String())
		}
	}
}

// A helper serves a batch with one process. A helper that does not support batches is called once per object.
func TestBatchOfHelper(t *testing.T) {
	for _, knows := range []bool{true, false} {
		t.Run(fmt.Sprint(knows), func(t *testing.T) {
			dir, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
			r := helper(t, filepath.Join(dir, "l"))
			t.Setenv("HELPER_LOG", log)
			if !knows {
				t.Setenv("HELPER_LACKS", "batch")
			}
			var blobs [][]byte
			var list []ocispec.Descriptor
			for i := range 12 {
				b := append(noise(i*50_000), byte(i))
				blobs = append(blobs, b)
				list = append(list, ocispec.Descriptor{MediaType: "a/b", Digest: digest.FromBytes(b), Size: int64(len(b))})
			}
			m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{},"layers":[],"subject":{"digest":%q}}`, ocispec.MediaTypeImageManifest, list[0].Digest)
			c, end := startBatch(t, r, PutBatch)
			for i, b := range blobs {
				if got, err := c.Put(t.Context(), list[i].Digest.String(), bytes.NewReader(b), "mediatype:a/b"); err != nil || got.Word != "stored" || got.Size != int64(len(b)) {
					t.Errorf("put: %v, %v", got, err)
				}
			}
			if got, err := c.Put(t.Context(), list[3].Digest.String(), bytes.NewReader(blobs[3])); err != nil || got.Word != "exists" {
				t.Errorf("put again: %v, %v", got, err)
			}
			for _, object := range []string{"latest", digest.FromBytes(m).String()} {
				if got, err := c.Put(t.Context(), object, bytes.NewReader(m)); err != nil || got.Digest != digest.FromBytes(m) {
					t.Errorf("put %s: %v, %v", object, got, err)
				}
			}
			_, err := c.Put(t.Context(), digest.FromString("other").String(), bytes.NewReader(blobs[3]), "mediatype:a/b")
			is(t, err, errdefs.IsDataLoss)
			has, err := c.HasAll(t.Context(), append(list, ocispec.Descriptor{MediaType: "a/b", Digest: digest.FromString("other")}))
			if err != nil || slices.ContainsFunc(has[:len(list)], isNo) || isYes(has[len(list)]) {
				t.Errorf("%v, %v", has, err)
			}
			if _, ok, err := c.Mount(t.Context(), list[0].Digest, "other"); err != nil || ok {
				t.Errorf("mount: %v, %v", ok, err)
			}
			if err := end(); err != nil {
				t.Error(err)
			}

			c, end = startBatch(t, r, FetchBatch)
			var all sync.WaitGroup
			for i, b := range blobs {
				all.Go(func() {
					got, err := fetchAll(t.Context(), c, list[i].Digest.String(), fmt.Sprintf("size:%d", len(b)), "offset:1")
					if err != nil || !bytes.Equal(got, b[1:]) {
						t.Errorf("%d bytes, not %d: %v", len(got), len(b)-1, err)
					}
					if _, has, err := c.Has(t.Context(), list[i].Digest.String(), "mediatype:a/b"); err != nil || !has {
						t.Errorf("has: %v, %v", has, err)
					}
				})
			}
			all.Wait()
			if got, err := fetchAll(t.Context(), c, "latest"); err != nil || !bytes.Equal(got, m) {
				t.Errorf("latest: %q, %v", got, err)
			}
			_, err = fetchAll(t.Context(), c, "none")
			is(t, err, errdefs.IsNotFound)
			lines, err := c.Referrers(t.Context(), list[0].Digest)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(lines); err != nil || !strings.Contains(string(b), digest.FromBytes(m).String()) {
				t.Errorf("referrers: %q, %v", b, err)
			}
			lines.Close()
			if err := end(); err != nil {
				t.Error(err)
			}
			said, _ := os.ReadFile(log)
			if n := strings.Count(string(said), "\n"); knows != (n == 2) {
				t.Errorf("%d processes:\n%s", n, said)
			}
		})
	}
}

// After a helper has died, the client gets the remaining objects from another process. The client does not wait for
// processes that the helper left running.
func TestBatchOfHelperThatDies(t *testing.T) {
	dir, log, fifo := t.TempDir(), filepath.Join(t.TempDir(), "log"), filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	release, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer release.Close()
	layout(t, filepath.Join(dir, "l"), "latest")
	r := helper(t, filepath.Join(dir, "l"))
	blob := noise(6 << 20)
	id := digest.FromBytes(blob).String()
	if _, err := r.Push(t.Context(), id, bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HELPER_LOG", log)
	t.Setenv("HELPER_FIFO", fifo)
	t.Setenv("HELPER_FAULT", "leave")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var beside sync.WaitGroup
	beside.Go(func() {
		for name, err := range r.Tags(ctx) {
			if name != "latest" || err != nil {
				t.Errorf("tags: %q, %v", name, err)
			}
		}
	})
	c, end := startBatch(t, r, FetchBatch)
	o, err := c.Fetch(ctx, id, fmt.Sprintf("size:%d", len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(o)
	o.Close()
	is(t, err, errdefs.IsAborted)
	if len(got) == 0 || len(got) == len(blob) {
		t.Fatalf("%d bytes came", len(got))
	}
	rest, err := fetchAll(ctx, c, id, fmt.Sprintf("size:%d", len(blob)), fmt.Sprintf("offset:%d", len(got)))
	if err != nil || !bytes.Equal(append(got, rest...), blob) {
		t.Errorf("%d and %d bytes, %v", len(got), len(rest), err)
	}
	beside.Wait()
	if err := end(); err != nil {
		t.Error(err)
	}
	said, _ := os.ReadFile(log)
	if n := strings.Count(string(said), "batch-fetch"); n != 2 {
		t.Errorf("%d processes:\n%s", n, said)
	}
}

// Responses of a helper in a batch are verified.
func TestBatchOfHelperThatLies(t *testing.T) {
	d := digest.FromString("content")
	for said, class := range map[string]func(error) bool{
		"ok " + d.String() + " 7 -\n7\nCONTENT0\nend\n": errdefs.IsDataLoss,
		"ok - - -\n7\nCONTENT0\nend\n":                  errdefs.IsDataLoss,
		"ok " + d.String() + " 7 -\n7\ncont":            errdefs.IsAborted,
		"Welcome\n":                                     errdefs.IsDataLoss,
		"error 9 no\n":                                  errdefs.IsUnauthorized,
		"":                                              errdefs.IsAborted,
	} {
		t.Setenv("HELPER_FAULT", cmp.Or(said, " "))
		c, _ := startBatch(t, helper(t, t.TempDir()), FetchBatch)
		b, err := fetchAll(t.Context(), c, d.String())
		if is(t, err, class); len(b) == len("content") {
			t.Errorf("%q: all of the content came", said)
		}
	}
}

// A put that is interrupted leaves a part. The next one sends only the rest, also through a helper.
func TestBatchPutGoesOn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	layout(t, dir, "example.org/x:1")
	for what, r := range map[string]Remote{"a directory": &Layout{dir: dir}, "a helper": helper(t, dir)} {
		blob := noise(8 << 20)
		blob = append(blob, what...)
		id := digest.FromBytes(blob).String()
		list := []ocispec.Descriptor{{MediaType: "a/b", Digest: digest.FromBytes(blob), Size: int64(len(blob))}}
		hints := batch.Hints(list[0])
		cut := func(content []byte, hints ...string) error {
			c, end := startBatch(t, r, PutBatch)
			_, err := c.Put(t.Context(), id, io.MultiReader(bytes.NewReader(content), errReader{errors.New("the source broke")}), hints...)
			return errors.Join(err, end())
		}
		ask := func(more ...string) batch.Answer {
			t.Helper()
			c, end := startBatch(t, r, PutBatch)
			has, err := c.HasAll(t.Context(), list, more...)
			if err = errors.Join(err, end()); err != nil {
				t.Fatal(err)
			}
			return has[0]
		}
		rest := func(content []byte, from int64) (batch.Answer, error) {
			c, end := startBatch(t, r, PutBatch)
			a, err := c.Put(t.Context(), id, bytes.NewReader(content), append(slices.Clone(hints), fmt.Sprint("offset:", from))...)
			return a, errors.Join(err, end())
		}
		if err := cut(blob[:6<<20], hints...); err == nil || !strings.Contains(err.Error(), "the source broke") {
			t.Fatalf("%s: %v", what, err)
		}
		part := ask(batch.Resume)
		if part.Word != "part" || part.Size <= 0 || part.Size > 6<<20 {
			t.Fatalf("%s: %v", what, part)
		}
		if a := ask(); a.Word != "no" {
			t.Errorf("%s: who does not ask for a part is told %q", what, a.Word)
		}
		if _, err := rest(blob[part.Size+1:], part.Size+1); !errdefs.IsAborted(err) {
			t.Errorf("%s: a rest that begins later: %v", what, err)
		}
		// The put is interrupted again, at a later offset.
		if err := cut(blob[part.Size:len(blob)-1], append(slices.Clone(hints), fmt.Sprint("offset:", part.Size))...); err == nil {
			t.Errorf("%s: a rest that was cut is stored", what)
		}
		if a := ask(batch.Resume); a.Word != "part" || a.Size < part.Size {
			t.Errorf("%s: after another cut: %v", what, a)
		} else {
			part = a
		}
		// A part with wrong bytes is removed.
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256/.tmp-"+digest.Digest(id).Encoded()), bytes.Repeat([]byte("x"), int(part.Size)), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := rest(blob[part.Size:], part.Size); !errdefs.IsAborted(err) {
			t.Errorf("%s: a part that is wrong: %v", what, err)
		}
		if a := ask(batch.Resume); a.Word != "no" {
			t.Errorf("%s: a part that is wrong stays: %v", what, a)
		}
		_ = cut(blob[:6<<20], hints...)
		part = ask(batch.Resume)
		if _, err := rest([]byte("other"), part.Size); err == nil {
			t.Errorf("%s: a rest that is wrong is stored", what)
		}
		_ = cut(blob[:6<<20], hints...)
		part = ask(batch.Resume)
		if a, err := rest(blob[part.Size:], part.Size); err != nil || a.Word != "stored" || a.Size != int64(len(blob)) {
			t.Errorf("%s: %v, %v", what, a, err)
		}
		if b, err := fetch(t, r, id); err != nil || !bytes.Equal(b, blob) {
			t.Errorf("%s: %d bytes, %v", what, len(b), err)
		}
	}
}

type errReader struct{ error }

func (e errReader) Read([]byte) (int, error) { return 0, e.error }

// A tag that another process has set, or that an attempt without a reply has set, counts as set: registries in which
// tags can't be changed refuse to set it again.
func TestPutOfATagThatIsSetMeanwhile(t *testing.T) {
	f := newFake(t)
	c, _ := startBatch(t, open(t, f.host(), Options{}), PutBatch)
	if _, has, err := c.Has(t.Context(), "latest"); has || err != nil {
		t.Fatal(has, err)
	}
	m := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{},"layers":[]}`, ocispec.MediaTypeImageManifest)
	for _, there := range []string{m, m + " "} {
		f.mu.Lock()
		f.manifests["latest"] = entry{ocispec.MediaTypeImageManifest, []byte(there)}
		f.fault = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			refused := r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/latest")
			if refused {
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, `{"errors":[{"code":"TAG_INVALID","message":"the tag is immutable"}]}`)
			}
			return refused
		}
		f.mu.Unlock()
		got, err := c.Put(t.Context(), "latest", strings.NewReader(m))
		if same := there == m; same != (err == nil) || same && got.Word != "exists" {
			t.Errorf("the same %v: %v, %v", same, got, err)
		}
	}
}
