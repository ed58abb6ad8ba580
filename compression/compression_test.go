package compression

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

func TestSniff(t *testing.T) {
	for head, want := range map[string]Format{
		"":                                 None,
		"\x1f\x8b":                         Gzip,
		"\x28\xb5\x2f\xfd":                 Zstd,
		"\x5f\x2a\x4d\x18\x00\x00\x00\x00": Zstd,
		"BZh91AY&SY":                       Bzip2,
		"BZh1\x17rE8P\x90":                 Bzip2,
		"\xfd7zXZ\x00":                     XZ,
		"\x04\x22\x4d\x18":                 LZ4,
		"\x02\x21\x4c\x18":                 LZ4,
		"LZIP\x01\x0c":                     Lzip,
		"\x1f\x9d\x90":                     Compress,
		"\x5d\x00\x00\x80\x00\xff\xff\xff\xff\xff\xff\xff\xff": LZMA,
		"\x5d\x00\x00\x00\x04\x10\x00\x00\x00\x00\x00\x00\x00": LZMA,
		"\x5d\x00\x00\x80\x00":                                 None,
	} {
		if got := Sniff([]byte(head)); got != want {
			t.Errorf("%q is %q, want %q", head, got, want)
		}
	}
}

// A plain tar begins with the name of its first entry, which may be any.
func TestNamesAreNoCompression(t *testing.T) {
	for _, name := range []string{"BZh", "BZh9", "BZh91AY", "LZIP", "]", "P", "P*M", "(", "7zXZ"} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if got := Sniff(b.Bytes()[:HeadSize]); got != None {
			t.Errorf("a tar that begins with %q is %q", name, got)
		}
	}
}

func TestNewReader(t *testing.T) {
	const text = "what is compressed"
	var gz, zs bytes.Buffer
	g := gzip.NewWriter(&gz)
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{g, z} {
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	skippable := "\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
	for _, stream := range []string{text, gz.String(), zs.String(), skippable + zs.String()} {
		r, done, err := NewReader(bufio.NewReader(strings.NewReader(stream)))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || string(got) != text {
			t.Errorf("%q: %q, %v", stream, got, err)
		}
		done()
	}
	if _, _, err := NewReader(bufio.NewReader(strings.NewReader(""))); err != io.EOF {
		t.Errorf("an empty stream: %v", err)
	}
	for _, stream := range []string{"LZIP\x01", "BZh91AY&SY"} {
		if _, _, err := NewReader(bufio.NewReader(strings.NewReader(stream))); !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v", stream, err)
		}
	}
}
