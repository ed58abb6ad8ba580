package inflate

import (
	"bytes"
	"compress/flate"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
)

func compress(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra")
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// samples has data of every kind: runs, text, noise, and data between these.
func samples() map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 700<<10)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	var text, skewed bytes.Buffer
	for text.Len() < 2<<20 {
		fmt.Fprintf(&text, "line %d: %x\n", rnd.IntN(1000), rnd.IntN(1<<20))
		if rnd.IntN(100) == 0 {
			text.Write(text.Bytes()[rnd.IntN(text.Len()):])
		}
	}
	for skewed.Len() < 300<<10 { // gives codes of every length
		b := 0
		for rnd.IntN(2) == 0 && b < 255 {
			b++
		}
		skewed.WriteByte(byte(b))
		if rnd.IntN(50) == 0 {
			skewed.Write(noise[:rnd.IntN(300)])
		}
	}
	periods := []byte{}
	for n := 1; n < 40; n++ {
		periods = append(periods, bytes.Repeat(noise[n*50:n*50+n], 1+3000/n)...)
	}
	return map[string][]byte{
		"empty": {}, "one": {7}, "zeros": make([]byte, 3<<20), "noise": noise,
		"text": text.Bytes()[:2<<20], "skewed": skewed.Bytes(), "periods": periods,
	}
}

func TestReader(t *testing.T) {
	for name, data := range samples() {
		for _, level := range []int{stdgzip.NoCompression, stdgzip.BestSpeed, stdgzip.DefaultCompression, stdgzip.BestCompression, stdgzip.HuffmanOnly} {
			z := compress(t, data, level)
			readers := map[string]io.Reader{"whole": bytes.NewReader(z), "half": iotest.HalfReader(bytes.NewReader(z)), "data+err": iotest.DataErrReader(bytes.NewReader(z))}
			if len(z) < 1<<20 {
				readers["byte"] = iotest.OneByteReader(bytes.NewReader(z))
			}
			for how, r := range readers {
				got, err := io.ReadAll(NewReader(r))
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, level %d, %s: %v, %d bytes of %d", name, level, how, err, len(got), len(data))
				}
			}
		}
	}
}

func TestMembers(t *testing.T) {
	one, two := compress(t, []byte("one"), 6), compress(t, bytes.Repeat([]byte("two"), 1e6), 1)
	all := bytes.Join([][]byte{one, two, compress(t, nil, 9), one}, nil)
	got, err := io.ReadAll(NewReader(bytes.NewReader(all)))
	if want := "one" + string(bytes.Repeat([]byte("two"), 1e6)) + "one"; err != nil || string(got) != want {
		t.Errorf("%v, %d bytes of %d", err, len(got), len(want))
	}
	if _, err := io.ReadAll(NewReader(bytes.NewReader(append(one, "garbage garbage"...)))); err != ErrHeader {
		t.Errorf("garbage after a member: %v", err)
	}
	// A member may not refer to bytes of the member before it.
	reach := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, 0x03, 0x02, 0x00) // fixed: length 3, distance 1, end
	if _, err := io.ReadAll(NewReader(bytes.NewReader(append(bytes.Clone(one), reach...)))); err != ErrCorrupt {
		t.Errorf("distance into the member before: %v", err)
	}
}

func TestDamage(t *testing.T) {
	data := samples()["skewed"][:20<<10]
	z := compress(t, data, 6)
	for n := range z {
		got, err := io.ReadAll(NewReader(bytes.NewReader(z[:n])))
		if err != io.ErrUnexpectedEOF || !bytes.HasPrefix(data, got) {
			t.Fatalf("cut to %d: %v", n, err)
		}
	}
	for n := range 8 {
		bad := bytes.Clone(z)
		bad[len(bad)-1-n] ^= 1
		if _, err := io.ReadAll(NewReader(bytes.NewReader(bad))); err != ErrChecksum {
			t.Errorf("byte %d of the trailer: %v", n, err)
		}
	}
	fail := errors.New("fail")
	r := io.MultiReader(bytes.NewReader(z[:2000]), iotest.ErrReader(fail))
	if _, err := io.ReadAll(NewReader(r)); err != fail {
		t.Errorf("error of the source: %v", err)
	}
}

// raw decodes DEFLATE, as Reader does inside a member.
func raw(data []byte) ([]byte, error) {
	d := decoder{r: bytes.NewReader(data), in: make([]byte, inputSize), out: make([]byte, outputSize)}
	var all []byte
	for d.state != atEnd {
		if len(d.out)-d.w < roomSize {
			gone := d.w - windowSize
			copy(d.out, d.out[gone:d.w])
			d.w, d.read = windowSize, windowSize
		}
		err := d.run()
		all = append(all, d.out[d.read:d.w]...)
		d.read = d.w
		if err != nil {
			return all, err
		}
		if len(all) > 4<<20 {
			return all, nil
		}
	}
	return all, nil
}

// FuzzFlate checks that the result for any input is that of compress/flate.
func FuzzFlate(f *testing.F) {
	for _, data := range samples() {
		for _, level := range []int{0, 1, 6, flate.HuffmanOnly} {
			var b bytes.Buffer
			w, _ := flate.NewWriter(&b, level)
			_, _ = w.Write(data[:min(len(data), 3000)])
			_ = w.Close()
			f.Add(b.Bytes())
		}
	}
	f.Fuzz(compare)
}

func compare(t *testing.T, data []byte) {
	got, err := raw(data)
	want, werr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(data)), 5<<20))
	if len(got) > 4<<20 {
		want, werr = want[:min(len(want), len(got))], nil
	}
	if (err == nil) != (werr == nil) {
		t.Fatalf("error is %v, of compress/flate %v", err, werr)
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, of compress/flate %d", len(got), len(want))
	}
	if n := min(len(got), len(want)); !bytes.Equal(got[:n], want[:n]) {
		t.Fatalf("the first %d bytes differ", n)
	}
}

// TestDifferential runs the fuzz target on many small damages, for test runs without fuzzing.
func TestDifferential(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for name, data := range samples() {
		for _, level := range []int{0, 1, 6, flate.HuffmanOnly} {
			var b bytes.Buffer
			w, _ := flate.NewWriter(&b, level)
			_, _ = w.Write(data[:min(len(data), 2000)])
			_ = w.Close()
			for range 400 {
				bad := bytes.Clone(b.Bytes())
				for range 1 + rnd.IntN(2) {
					bad[rnd.IntN(min(len(bad), 1+rnd.IntN(150)))] ^= 1 << rnd.IntN(8)
				}
				compare(t, bad)
				if t.Failed() {
					t.Fatalf("%s, level %d: %x", name, level, bad)
				}
			}
		}
	}
}

// BenchmarkReader decompresses the file that BENCH_GZIP names, or else the text sample.
func BenchmarkReader(b *testing.B) {
	z := compress(b, samples()["text"], 6)
	if p := os.Getenv("BENCH_GZIP"); p != "" {
		var err error
		if z, err = os.ReadFile(p); err != nil {
			b.Fatal(err)
		}
	}
	size, err := io.Copy(io.Discard, NewReader(bytes.NewReader(z)))
	if err != nil {
		b.Fatal(err)
	}
	for _, impl := range []struct {
		name string
		open func() (io.Reader, error)
	}{
		{"ours", func() (io.Reader, error) { return NewReader(bytes.NewReader(z)), nil }},
		{"klauspost", func() (io.Reader, error) { return gzip.NewReader(bytes.NewReader(z)) }},
		{"std", func() (io.Reader, error) { return stdgzip.NewReader(bytes.NewReader(z)) }},
	} {
		b.Run("impl="+impl.name, func(b *testing.B) {
			b.SetBytes(size)
			buf := make([]byte, 256<<10)
			for b.Loop() {
				r, err := impl.open()
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
