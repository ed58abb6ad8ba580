package remotes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"distkit/batch"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// fetcher fetches from a remote, or through a batch.
type fetcher func(id string, hints ...string) ([]byte, error)

// ofRemote returns the fetcher of a remote.
func ofRemote(t *testing.T, r Remote) fetcher {
	return func(id string, hints ...string) ([]byte, error) { return fetch(t, r, id, hints...) }
}

// ofBatch returns the fetcher of a batch over a remote.
func ofBatch(t *testing.T, r Remote) fetcher {
	c, _ := startBatch(t, r, FetchBatch)
	return func(id string, hints ...string) ([]byte, error) { return fetchAll(t.Context(), c, id, hints...) }
}

// Every remote returns the same bytes for a range, whether or not its server can skip and cut.
func TestRanges(t *testing.T) {
	small, large := noise(3000), noise(3<<20+7)
	dir := filepath.Join(t.TempDir(), "x")
	layout(t, dir, "example.org/x:1")
	l := &Layout{dir: dir}
	f, whole := newFake(t), newFake(t)
	for _, b := range [][]byte{small, large} {
		f.blob(b)
		whole.blob(b)
		if _, err := l.Push(t.Context(), digest.FromBytes(b).String(), bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
	}
	whole.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		r.Header.Del("Range")
		return false
	})
	h := helper(t, dir)
	t.Setenv("HELPER_IGNORES", "range:")
	for what, get := range map[string]fetcher{
		"a directory":                           ofRemote(t, l),
		"a batch of a directory":                ofBatch(t, l),
		"a registry":                            ofRemote(t, open(t, f.host(), Options{})),
		"a registry, in parts":                  ofRemote(t, open(t, f.host(), Options{Parts: 3})),
		"a registry, unverified":                ofRemote(t, open(t, f.host(), Options{Unverified: true})),
		"a batch of a registry":                 ofBatch(t, open(t, f.host(), Options{Streams: batch.Ahead})),
		"a registry without ranges":             ofRemote(t, open(t, whole.host(), Options{})),
		"a registry without ranges, unverified": ofRemote(t, open(t, whole.host(), Options{Unverified: true})),
		"a registry without ranges, in parts":   ofRemote(t, open(t, whole.host(), Options{Parts: 3})),
		"a helper without ranges":               ofRemote(t, h),
		"a batch of a helper without ranges":    ofBatch(t, h),
	} {
		for _, b := range [][]byte{small, large} {
			id, n := digest.FromBytes(b).String(), int64(len(b))
			for _, c := range []struct {
				hints      string
				begin, end int64 // -1: the range is an invalid argument
			}{
				{"range:0-0", 0, 1},
				{"range:1-1", 1, 2},
				{"range:1000-1999", 1000, 2000},
				{fmt.Sprintf("range:0-%d", n-1), 0, n},
				{fmt.Sprintf("range:0-%d", n-2), 0, n - 1},
				{fmt.Sprintf("range:%d-%d", n-1, n-1), n - 1, n},
				{fmt.Sprintf("range:5-%d", 2*n), 5, n},
				{fmt.Sprintf("range:5-2999 size:%d", n), 5, min(3000, n)},
				{"range:1000-1999 offset:1500", 1500, 2000},
				{"offset:1500 range:1000-1999", 1500, 2000},
				{"range:1000-1999 offset:2000", 2000, 2000},
				{"range:9-5", 0, n},
				{"range:x-5", 0, n},
				{"offset:+5", 0, n},
				{"offset:05 size:+1", 0, n},
				{fmt.Sprintf("range:%d-%d", n, n), -1, -1},
				{fmt.Sprintf("range:%d-%d", n+1, n+5), -1, -1},
			} {
				got, err := get(id, strings.Fields(c.hints)...)
				switch {
				case c.begin >= 0 && (err != nil || !bytes.Equal(got, b[c.begin:c.end])):
					t.Errorf("%s, %s of %d: %d bytes, %v", what, c.hints, n, len(got), err)
				case c.begin < 0 && (!errdefs.IsInvalidArgument(err) || len(got) > 0):
					t.Errorf("%s, %s of %d: %d bytes, %v", what, c.hints, n, len(got), err)
				}
			}
			if got, err := get(id, "range:0-9", "size:5"); !errdefs.IsDataLoss(err) {
				t.Errorf("%s, of another size: %d bytes, %v", what, len(got), err)
			}
		}
		// A batch can continue after a range.
		if got, err := get(digest.FromBytes(small).String()); err != nil || !bytes.Equal(got, small) {
			t.Errorf("%s, behind ranges: %d bytes, %v", what, len(got), err)
		}
	}
}

// Only the range is read of a blob, except if the registry can't serve ranges.
func TestRangesAreAskedFor(t *testing.T) {
	blob := noise(8 << 20)
	f := newFake(t)
	id := f.blob(blob)
	for _, parts := range []int{1, 2} {
		r := open(t, f.host(), Options{Parts: parts})
		if got, err := fetch(t, r, id, "range:1000000-6999999"); err != nil || !bytes.Equal(got, blob[1_000_000:7_000_000]) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		for i := range f.count() {
			r := f.request(i)
			var begin, end int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &begin, &end); err != nil || begin < 1_000_000 || end > 6_999_999 {
				t.Errorf("%s %s: %q", r.Method, r.URL.Path, r.Header.Get("Range"))
			}
		}
	}
}

// Whatever the hints, a directory and a batch return the same: a part of the blob, or an error of class InvalidArgument
// or DataLoss.
func FuzzHints(f *testing.F) {
	for _, s := range []string{"", "range:0-5", "range:5-5 offset:7", "range:10-2 size:12", "offset:12", "range:12-12", "size:11", "range:0-9223372036854775807 x", "range:-5 mediatype:a/b", "offset:+5", "offset:05", "size:+11"} {
		f.Add(s)
	}
	blob := []byte("some content")
	id := digest.FromBytes(blob).String()
	l := &Layout{dir: filepath.Join(f.TempDir(), "x")}
	if _, err := l.Push(context.Background(), id, bytes.NewReader(blob)); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		hints := strings.Fields(s)
		if len(hints) > 16 {
			return
		}
		direct, derr := ofRemote(t, l)(id, hints...)
		if derr != nil && !errdefs.IsInvalidArgument(derr) && !errdefs.IsDataLoss(derr) {
			t.Errorf("%q: %v", s, derr)
		}
		if derr == nil && !bytes.Contains(blob, direct) {
			t.Errorf("%q: %q", s, direct)
		}
		line := "get " + id + " " + strings.Join(hints, " ")
		if len(line) >= batch.MaxLine || !isPrintable(line) {
			return
		}
		inR, inW := io.Pipe()
		outR, outW := io.Pipe()
		go func() { outW.CloseWithError(errors.Join(FetchBatch(t.Context(), l, inR, outW), io.EOF)) }()
		c := batch.NewClient(outR, inW)
		defer c.Close()
		got, err := fetchAll(t.Context(), c, id, hints...)
		if (err == nil) != (derr == nil) || err == nil && !bytes.Equal(got, direct) {
			t.Errorf("%q: %q, %v from a batch; %q, %v directly", s, got, err, direct, derr)
		}
	})
}

func isPrintable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}
