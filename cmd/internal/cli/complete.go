package cli

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"distkit/cmd/internal/sibling"

	"github.com/spf13/cobra"
)

// lists are the commands that list what can stand for a word of a usage line, or be the value of a flag of that name.
var lists = [...]struct {
	words   string // in spaces
	command []string
}{
	{" NAME OLD REF ", []string{"dist-image", "ls", "-q"}},
	{" DIGEST ", []string{"dist-list", "-q"}},
	{" KEY PARENT CHAIN ", []string{"snap", "ls", "-q"}},
	{" ID ", []string{"task", "ls", "-a", "-q"}},
	{" --namespace --from-namespace --to-namespace ", []string{"dist-namespace", "ls", "-q"}},
	{" --snapshotter ", []string{"snap", "drivers", "-q"}},
}

// platforms are offered for --platform.
var platforms = []string{"local", "linux/386", "linux/amd64", "linux/arm/v7", "linux/arm64", "linux/ppc64le", "linux/riscv64", "linux/s390x"}

// A shell waits for completions: it gets no more than maxOffers, and none after offerTime.
const (
	maxOffers  = 500
	offerTime  = 2 * time.Second
	maxListing = 16 << 20 // bytes
)

// completed gives a command completions of its operands and of its flags' values: what its store has. What a command completes itself
// is kept.
func completed(c *cobra.Command) {
	own := c.ValidArgsFunction
	words := operands(c.Use)
	c.ValidArgsFunction = func(c *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if own != nil {
			found, directive := own(c, args, word)
			return harmless(found), directive
		}
		var found []string
		if len(words) > 0 {
			if repeats := strings.Contains(c.Use, "…"); len(args) < len(words) || repeats {
				for _, kind := range strings.Split(words[min(len(args), len(words)-1)], "|") {
					found = append(found, offers(c, strings.Trim(kind, "[]…-"), word)...)
				}
			}
		}
		if len(found) == 0 {
			return nil, cobra.ShellCompDirectiveDefault // files
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
	for _, flag := range []string{"namespace", "from-namespace", "to-namespace", "snapshotter", "platform"} {
		if c.Flags().Lookup(flag) == nil {
			continue
		}
		_ = c.RegisterFlagCompletionFunc(flag, func(c *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			if flag == "platform" {
				return platforms, cobra.ShellCompDirectiveNoFileComp
			}
			return offers(c, "--"+flag, word), cobra.ShellCompDirectiveNoFileComp
		})
	}
}

// offers returns what of a kind begins with a word, as the command lists it that knows. If it fails, there is nothing.
func offers(c *cobra.Command, kind, word string) (found []string) {
	if kind == "DIGEST" && len(word) < 2 {
		return nil // there are too many
	}
	for _, l := range lists {
		if !strings.Contains(l.words, " "+kind+" ") {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), offerTime)
		defer cancel()
		list := exec.CommandContext(ctx, sibling.Path(l.command[0]), l.command[1:]...)
		list.Env = os.Environ()
		for flag, variable := range map[string]string{"root": "DIST_ROOT", "namespace": "CONTAINERD_NAMESPACE", "state": "DIST_STATE", "snapshotter": "CONTAINERD_SNAPSHOTTER"} {
			if f := c.Flags().Lookup(flag); f != nil && f.Value.String() != "" {
				list.Env = append(list.Env, variable+"="+f.Value.String())
			}
		}
		out, err := list.StdoutPipe()
		if err != nil || list.Start() != nil {
			return nil
		}
		for lines := bufio.NewScanner(io.LimitReader(out, maxListing)); lines.Scan() && len(found) < maxOffers; {
			s := lines.Text()
			if strings.HasPrefix(s, word) {
				found = append(found, s)
			}
		}
		cancel()
		_ = list.Wait()
	}
	return harmless(found)
}

// harmless leaves out what a shell could read as anything but a word. The completion scripts of bash expand what they are given, command
// substitutions too, and names and keys come from stores that may be a stranger's.
func harmless(found []string) []string {
	var kept []string
	for _, s := range found {
		if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./:@_+-") == "" && s[0] != '-' {
			kept = append(kept, s)
		}
	}
	return kept
}
