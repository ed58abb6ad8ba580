package inflate

import (
	"bytes"
	stdgzip "compress/gzip"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"
)

// index returns the plain bytes of a stream, and points that are at least that many bytes apart.
func index(t testing.TB, z []byte, apart int64) ([]byte, []Point) {
	t.Helper()
	var list []Point
	due := int64(0)
	r := NewIndexer(iotest.HalfReader(bytes.NewReader(z)), func(out int64) bool {
		if out < due {
			return false
		}
		due = out + apart
		return true
	}, func(p Point) { list = append(list, p) })
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return plain, list
}

func checkPoints(t testing.TB, z, data []byte, apart int64) []Point {
	t.Helper()
	plain, list := index(t, z, apart)
	if !bytes.Equal(plain, data) {
		t.Fatalf("%d bytes, not %d", len(plain), len(data))
	}
	if len(list) == 0 || list[0].In != 0 || !list[0].AtMember {
		t.Fatalf("the first point is not the beginning: %+v", list)
	}
	for i, p := range list {
		if i > 0 && (p.Out < list[i-1].Out || p.In <= list[i-1].In) {
			t.Fatalf("point %d does not come after the one before", i)
		}
		r, err := NewReaderAt(iotest.HalfReader(bytes.NewReader(z[p.In/8:])), p)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data[p.Out:]) {
			t.Fatalf("from point %d, at bit %d and byte %d: %v, %d bytes of %d", i, p.In, p.Out, err, len(got), len(data[p.Out:]))
		}
	}
	return list
}

// Decompression that starts at a point returns the bytes that follow the point. The streams have all kinds of blocks
// and several members.
func TestPoints(t *testing.T) {
	t.Parallel()
	for name, data := range samples() {
		var all, plain []byte
		for _, level := range []int{stdgzip.NoCompression, stdgzip.BestSpeed, stdgzip.DefaultCompression, stdgzip.BestCompression, stdgzip.HuffmanOnly} {
			z := compress(t, data, level)
			list := checkPoints(t, z, data, 250<<10)
			if name == "text" && len(list) < 3 {
				t.Errorf("level %d: %d points in %d bytes", level, len(list), len(data))
			}
			all, plain = append(all, z...), append(plain, data...)
		}
		checkPoints(t, all, plain, 900<<10)
	}
}

// A window has the bytes that later data refers to, and zeros in place of the others.
func TestWindowsAreSparse(t *testing.T) {
	t.Parallel()
	data := samples()["text"]
	_, list := index(t, compress(t, data, 6), 64<<10)
	used, all := 0, 0
	for _, p := range list {
		from := p.Out - int64(len(p.Window))
		for i, b := range p.Window {
			if b != 0 && b != data[from+int64(i)] {
				t.Fatalf("byte %d of the window at %d is wrong", i, p.Out)
			}
			if all++; b != 0 {
				used++
			}
		}
	}
	if used == 0 || used == all {
		t.Errorf("%d of %d bytes of windows are kept", used, all)
	}
}

// A wrong point leads to wrong bytes or an error, and never to a panic.
func TestWrongPoints(t *testing.T) {
	t.Parallel()
	data := samples()["text"][:300<<10]
	z := compress(t, data, 6)
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		p := Point{In: rnd.Int64N(8 * int64(len(z))), AtMember: rnd.IntN(4) == 0, Window: data[:rnd.IntN(40<<10)]}
		r, err := NewReaderAt(bytes.NewReader(z[p.In/8:]), p)
		if err == nil {
			_, _ = io.Copy(io.Discard, io.LimitReader(r, 10<<20))
		}
	}
}

// FuzzPoints makes streams with the members, levels, flushes and contents that the input says, and starts at each of
// their points.
func FuzzPoints(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, uint64(1))
	f.Add([]byte{60, 61, 250, 130, 7, 7, 7, 200}, uint64(2))
	f.Add(bytes.Repeat([]byte{5, 90, 180}, 20), uint64(3))
	f.Fuzz(func(t *testing.T, script []byte, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var z bytes.Buffer
		var data []byte
		level := stdgzip.DefaultCompression
		w, _ := stdgzip.NewWriterLevel(&z, level)
		for _, b := range script[:min(len(script), 64)] {
			n := rnd.IntN(1 << (b % 16))
			var piece []byte
			switch b / 64 {
			case 0: // noise
				for range n {
					piece = append(piece, byte(rnd.Uint32()))
				}
			case 1: // earlier bytes again
				if len(data) > 0 {
					from := rnd.IntN(len(data))
					piece = bytes.Clone(data[from:min(from+n, len(data))])
				}
			case 2: // letters
				for range n {
					piece = append(piece, 'a'+byte(rnd.IntN(4)))
				}
			default: // start a member, or flush
				if b%2 == 0 {
					if err := w.Flush(); err != nil {
						t.Fatal(err)
					}
				} else if err := w.Close(); err != nil {
					t.Fatal(err)
				} else {
					w, _ = stdgzip.NewWriterLevel(&z, int(b/2%10))
				}
			}
			if _, err := w.Write(piece); err != nil {
				t.Fatal(err)
			}
			data = append(data, piece...)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		checkPoints(t, z.Bytes(), data, int64(rnd.IntN(1<<14)))
	})
}

// BenchmarkPoints decompresses the file that BENCH_GZIP names, or else the text sample, with and without points.
func BenchmarkPoints(b *testing.B) {
	z := compress(b, samples()["text"], 6)
	if p := os.Getenv("BENCH_GZIP"); p != "" {
		var err error
		if z, err = os.ReadFile(p); err != nil {
			b.Fatal(err)
		}
	}
	for name, apart := range map[string]int64{"none": 0, "1MiB": 1 << 20, "4MiB": 4 << 20} {
		b.Run("apart="+name, func(b *testing.B) {
			buf := make([]byte, 256<<10)
			for b.Loop() {
				r := NewReader(bytes.NewReader(z))
				if apart > 0 {
					due := int64(0)
					r = NewIndexer(bytes.NewReader(z), func(out int64) bool {
						if out < due {
							return false
						}
						due = out + apart
						return true
					}, func(Point) {})
				}
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(n)
			}
		})
	}
}
