package gate

import (
	"testing"

	"github.com/spf13/pflag"
)

// What is appended to a command are its arguments, never a command or a comment.
func TestFlag(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		"policy": true, "policy \n": true, "bash ./policy 'a;b'": true, "echo noise; true": true, "A=1 policy": true, "! policy": true, "a | b": true,
		">out policy": true, "policy >out 2>&1": true, "while :; do break; done; :": true, "policy a#b": true, "# note\npolicy": true, `policy 'a # b'`: true,
		"": false, " ": false, "policy;": false, "policy; ": false, "policy\n;": false, "policy &": false, "policy &&": false, "policy |": false, "policy ||\n": false,
		"A=1": false, "policy; A='1 2' B=\"3;4\"": false, ">out": false, "policy; >&2": false, "policy; 2>> out": false, "policy &>out": false,
		"!": false, "policy; ! ": false, "policy # note": false, "policy\n# note\n": false, "policy;# note": false, `policy \`: false, "policy \\\n": false,
	} {
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		got := Flag(f)
		if err := f.Parse([]string{"--verify=" + text}); (err == nil) != ok || ok && *got == "" {
			t.Errorf("%q: %q, %v", text, *got, err)
		}
	}
}
