package compression

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
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

// A plain tar begins with the name of its first entry, which may have any bytes.
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

// A turn is taken once, before the first large window, wherever in the stream that is. If taking it fails, the read
// fails.
func TestReaderInTurn(t *testing.T) {
	t.Parallel()
	frame := func(window int, text string, o ...zstd.EOption) string {
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b, append(o, zstd.WithWindowSize(window))...)
		if err != nil {
			t.Fatal(err)
		}
		// Flush makes the encoder write a frame with a window size; otherwise it would write the size of the content.
		if _, err := io.WriteString(w, text[:1]); err != nil || w.Flush() != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text[1:]); err != nil || w.Close() != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	repeated := strings.Repeat("x", 1<<20)
	small, large := frame(LargeWindow, "small "+repeated), frame(2*LargeWindow, "large "+repeated, zstd.WithEncoderCRC(false))
	skippable := "\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
	for stream, want := range map[string]int{
		small: 0, small + skippable + small: 0, large: 1, skippable + small + small + large + small + large: 1,
	} {
		times := 0
		r, done, err := NewReaderInTurn(bufio.NewReader(strings.NewReader(stream)), func() error { times++; return nil })
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(r)
		if n := strings.Count(string(plain), " "+repeated); err != nil || times != want || n != strings.Count(stream, small)+strings.Count(stream, large) {
			t.Errorf("asked %d times, not %d; %d frames: %v", times, want, n, err)
		}
		done()
		late := errors.New("too late")
		r, done, err = NewReaderInTurn(bufio.NewReader(strings.NewReader(stream)), func() error { return late })
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); want > 0 && !errors.Is(err, late) || want == 0 && err != nil {
			t.Errorf("without a turn: %v", err)
		}
		done()
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
