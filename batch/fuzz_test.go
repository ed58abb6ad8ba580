package batch

import (
	"bufio"
	"bytes"
	"io"
	"strings"
	"testing"

	"distkit/errclass"

	"github.com/opencontainers/go-digest"
)

// Whatever a client sends, the server returns, stores whole objects only, and sends answers that a client can parse.
func FuzzServe(f *testing.F) {
	known := []byte("some content")
	d := digest.FromBytes(known).String()
	for _, s := range []string{
		"", "get " + d + "\nget " + d + " offset:3 size:12\n", "has " + d + "\nhas x\n", "put x\n3\nabc0\nend\nget x\n",
		"put x\n3\nabc2\nde0\nabort\n", "put x\n3\nab", "mount " + d + " y\n", "referrers " + d + "\n", "put x\n99999999\n", "get  \n", "nope\n", "get " + d + " offset:13\n",
		"get " + d + " range:3-5\nget " + d + " range:12-12 offset:3\n", "has sha256:x resume:yes\nput x offset:3\n2\nab0\nend\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		s := newStore(known)
		var out bytes.Buffer
		err := Serve(t.Context(), bytes.NewReader(in), &out, s.handlers())
		if n := errclass.Status(err); n != 0 && n != 2 && n != 6 {
			t.Errorf("status %d: %v", n, err)
		}
		if n := bytes.Count(in, []byte("\nend\n")); len(s.blobs) > 1+n {
			t.Errorf("%d puts ended, and %d blobs are stored", n, len(s.blobs)-1)
		}
		r := bufio.NewReader(&out)
		for {
			line, err := readLine(r)
			if err == io.EOF {
				break
			}
			word, _, _ := strings.Cut(line, " ")
			if err != nil || !strings.Contains(" ok yes no stored error ", " "+word+" ") {
				t.Fatalf("an answer is %q, %v", line, err)
			}
			if word == "ok" {
				c := &content{r: r, trailer: parseFailure}
				if b, err := io.ReadAll(c); err != nil && c.broken != nil {
					t.Fatalf("content %q: %v", b, err)
				}
			}
		}
	})
}

// Whatever a server sends, the client's request ends, with the object's exact bytes or an error, and so does the next
// one.
func FuzzClient(f *testing.F) {
	known := []byte("some content")
	d := digest.FromBytes(known).String()
	for _, s := range []string{
		"", "ok " + d + " 12 a/b\n12\nsome content0\nend\nno\n", "ok - - -\n5\nsome 7\ncontent0\nend\nyes " + d + " 12 -\n",
		"error 3 no\nerror 6 \n", "ok " + d + " 12 -\n5\nsome 0\nerror 6 cut\nno\n", "ok " + d + " 012 -\n", "stored " + d + " 1\n", "no\npart " + d + " 7\n", "no\npart " + d + "\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		c := NewClient(bytes.NewReader(out), nopCloser{io.Discard})
		defer c.Close()
		o, err := c.Fetch(t.Context(), d)
		if err == nil {
			var b []byte
			b, err = io.ReadAll(o)
			o.Close()
			if err == nil && !bytes.Equal(b, known) {
				t.Errorf("%q was taken for %s", b, d)
			}
		}
		if err != nil && (errclass.Status(err) == 0 || strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 2*MaxLine) {
			t.Errorf("%q", err)
		}
		if desc, has, err := c.Has(t.Context(), d); has && desc.Digest != "" && desc.Digest.String() != d {
			t.Errorf("%v, %v", desc, err)
		}
	})
}
