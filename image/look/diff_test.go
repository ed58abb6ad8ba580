package look

import (
	"archive/tar"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestDiff(t *testing.T) {
	t.Parallel()
	a := []entry{reg("d/x", "1"), reg("d-e", ""), reg("d/same", "s"), reg("gone/x", ""), link(tar.TypeSymlink, "l", "a"), reg("t", ""), dir("late")}
	b := []entry{reg("d/x", "2"), reg("d-e", "more"), reg("d/same", "s"), reg("d.new", ""), link(tar.TypeSymlink, "l", "b"), dir("t"), dir("late")}
	b[2].ModTime = b[2].ModTime.AddDate(1, 0, 0)
	b[0].Mode, b[0].Uid = 0o4755, 7
	b[1].PAXRecords = map[string]string{"SCHILY.xattr.user.x": "1"}
	la, lb := storedImage(t, a), storedImage(t, b)
	for times, want := range map[bool]string{
		false: "A /d.new C /d-e size,content,xattrs C /d/x mode,owner,content D /gone D /gone/x C /l target C /t type",
		true:  "A /d.new C /d-e size,content,xattrs C /d/same time C /d/x mode,owner,content D /gone D /gone/x C /l target C /t type",
	} {
		var got []string
		err := Diff(t.Context(), la, lb, times, 0, func(d Difference) error {
			got = append(got, strings.TrimSpace(fmt.Sprint(d.Change+" "+d.Path+" ", strings.Join(d.What, ","))))
			return nil
		})
		words := strings.Fields(strings.Join(got, " "))
		wanted := strings.Fields(want)
		slices.Sort(words)
		slices.Sort(wanted)
		if err != nil || !slices.Equal(words, wanted) {
			t.Errorf("got %q, %v", got, err)
		}
	}
	if err := Diff(t.Context(), la, la, true, 0, func(d Difference) error { return fmt.Errorf("%+v", d) }); err != nil {
		t.Errorf("an image and itself: %v", err)
	}
}
