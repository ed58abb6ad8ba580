package look

import (
	"fmt"
	"testing"
)

func TestMeasure(t *testing.T) {
	t.Parallel()
	layers := storedImage(t, []entry{reg("a/x", "1234"), reg("a/y", "12345678"), link('1', "b", "a/x"), reg("d/e/f", "same")},
		[]entry{reg("a/y", "same"), reg("d/.wh.e", ""), reg("empty", ""), reg("empty2", "")}, []entry{reg("a/z", "1234")})
	var wasted []Waste
	u, err := Measure(t.Context(), layers, UsageOptions{Hash: true, Wasted: func(w Waste) { wasted = append(wasted, w) }})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(wasted); got != "[{/a/y 8 1 2} {/d/e/f 4 1 2}]" {
		t.Errorf("wasted: %s", got)
	}
	for i, want := range []string{"3 16 12", "3 4 0", "1 4 0"} {
		if got := fmt.Sprint(u.Layers[i].Files, u.Layers[i].Bytes, u.Layers[i].Wasted); got != want || u.Layers[i].Size != layers[i].Size {
			t.Errorf("layer %d: %s, not %s", i+1, got, want)
		}
	}
	var got []string
	note := func(f *FileUsage) error {
		got = append(got, fmt.Sprint(f.Path, f.Bytes, f.Files, f.ID))
		return nil
	}
	err = u.Walk(func(f *FileUsage) error {
		if f.Dir {
			return nil
		}
		return note(f)
	}, note)
	if want := "[/a/x4 1 1 /a/y4 1 0 /a/z4 1 0 /a12 3 0 /b4 1 1 /d0 0 0 /empty0 1 0 /empty20 1 0 /12 5 0]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("got %s, %v", got, err)
	}
	list, err := u.Duplicates()
	if err != nil || len(list) != 2 || list[0].Path != "/a/x" || list[1].Path != "/a/z" || list[1].Layer != 3 || list[0].Content != "03ac674216f3e15c761ee1a5e255f067" {
		t.Errorf("duplicates: %v, %v", list, err)
	}
}
